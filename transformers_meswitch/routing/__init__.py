"""Routers: they read a prompt and pick the expert."""
