"""What every part uses: files that appear whole or not at all, and random numbers that follow a seed."""
