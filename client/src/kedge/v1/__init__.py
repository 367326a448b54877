"""Messages generated from proto/kedge/v1; `make proto` writes them anew."""
