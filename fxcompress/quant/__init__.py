"""The numbers of quantisation, without graphs."""
