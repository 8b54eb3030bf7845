"""Run trained models on images."""
