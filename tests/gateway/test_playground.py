"""The pages in headless Chromium, against a real worker: driven as a person would."""
