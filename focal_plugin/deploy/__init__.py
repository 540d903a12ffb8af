"""A trained model at work: on images and videos of one's own, and as TorchScript and ONNX."""
