"""Draw a denoiser's graph, the whole or one block, its weights coloured by the methods of a configuration.

python scripts/plot_dag.py --family pixart_alpha
python scripts/plot_dag.py --family sdxl --block down_blocks.1.resnets.0 --q_config uniform:kmeans-4 --output block.svg
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("plot_dag")
