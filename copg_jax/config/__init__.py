"""Typed configs: sections, the stages composed of them, and how they are loaded from YAML."""
