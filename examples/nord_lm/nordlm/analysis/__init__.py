"""What a trained model does: losses, rates, energy, reports."""
