"""What reports are made of: tables of texts, and sheets of images."""
