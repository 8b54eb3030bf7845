"""Pictures and plots for people. Imports nothing else of raydetr."""
