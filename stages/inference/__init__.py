"""A trained model applied to images: inputs, the translator, outputs."""
