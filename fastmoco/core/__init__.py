"""What every station stands on."""
