"""The rule engine: patterns, matches with reasons for refusals, and the driver."""
