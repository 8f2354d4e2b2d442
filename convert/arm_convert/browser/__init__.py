"""A model as one web page that runs it, without a server and without a network."""
