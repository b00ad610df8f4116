"""What a pass is, and how a list of passes runs."""
