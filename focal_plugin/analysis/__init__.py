"""Which windows of a trained model carry the loss: Figures 1 and 4 of the paper."""
