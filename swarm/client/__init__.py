"""Talking to a swarm: the coordinator's calls, sessions over nodes, generation and scoring."""
