"""Small pipelines with the real denoisers' topology, trained on scikit-learn's digits, that run offline."""
