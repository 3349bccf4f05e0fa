"""The network. This folder travels with exported models: it imports nothing of the project outside itself."""
