"""The measuring station: this program against what people use, in pairs, on one machine."""
