"""The loops behind the training passes."""
