"""Everything that touches torch.fx: capture, node metadata, operator tables, edits, printing, verification."""
