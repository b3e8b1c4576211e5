"""What runs in the driver's process: the pair, and all that it watches over."""
