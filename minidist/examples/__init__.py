"""Programs to run: python -m minidist.examples.mnist"""
