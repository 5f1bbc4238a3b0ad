"""What every other folder shares: errors, configuration, wire messages, byte layouts, clock."""
