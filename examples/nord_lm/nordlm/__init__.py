"""What the scripts of the language model share."""
