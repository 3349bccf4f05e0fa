"""Reference checkpoints in; hub folders and ONNX graphs out."""
