"""What the machine can do, what a step needs, and where its time goes."""
