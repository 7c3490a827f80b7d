"""One question a file: this program against what people use, in pairs, on one machine."""
