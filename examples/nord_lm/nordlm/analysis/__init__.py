"""Analysis of a trained model: loss, firing rates, energy, reports."""
