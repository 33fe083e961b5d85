"""One table for each family of models of the field: settings and names of tensors."""
