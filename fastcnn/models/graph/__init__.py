"""Networks as graphs of operations: read from ONNX files, traced from models, compared, built, and written to files."""
