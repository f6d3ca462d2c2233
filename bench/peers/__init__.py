"""PyTorch implementations of the same decoder, to compare speed with; `steps.VARIANTS` lists them."""
