"""What a training phase needs: the loop, its checkpoints, curves, gradients and messages."""
