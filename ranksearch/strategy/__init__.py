"""What is searched, from where it starts, who proposes, and how one plan is judged."""
