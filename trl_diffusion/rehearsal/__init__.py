"""What can be known of a run before it is paid for: its mistakes, what it needs, and a few of its steps on random weights."""
