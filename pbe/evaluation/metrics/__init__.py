"""Scores of finished edits: the paper's, clean ones, the toy world's; ``scoring`` runs them."""
