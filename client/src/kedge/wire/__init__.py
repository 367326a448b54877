"""What client and server must agree on: names, errors, manifests, chunks and the proto forms of configuration."""
