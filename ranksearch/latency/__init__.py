"""Time: where models run, how their times are taken, and how the time of a plan is predicted."""
