"""The HTTP front: OpenAI's API over the nodes of a cluster."""
