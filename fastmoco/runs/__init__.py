"""The run folder: what train leaves behind and evaluate reads."""
