"""Text and pictures to ids and back, and the sequences made of them."""
