"""One table per family of published models: settings and tensor names."""
