"""What others do, written or called as their users do."""
