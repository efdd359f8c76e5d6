"""The data sets, one data module per source."""
