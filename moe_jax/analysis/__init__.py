"""What the router did and what the model learned, in figures and numbers."""
