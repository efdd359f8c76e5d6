"""Put sentences of textbooks about BatchNorm to the test: experiments, and verdicts by rules stated beforehand."""
