"""What a run achieved: reconstructions, numbers and a page.  Trains and generates nothing."""
