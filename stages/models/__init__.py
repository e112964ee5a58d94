"""The networks of Pix2Pix and Pix2PixHD, their losses and one training step. Torch only."""
