"""Every figure and every page of the project. Matplotlib and the templates live here and nowhere else."""

from pix2mass.report.catalog_page import write_catalog_report as write_catalog_report
from pix2mass.report.cluster_map import ClusterMap as ClusterMap
from pix2mass.report.maps import map_figure as map_figure
from pix2mass.report.maps import write_map_figure as write_map_figure
from pix2mass.report.run_figures import METHODS as METHODS
from pix2mass.report.run_figures import confusion_figure as confusion_figure
from pix2mass.report.run_figures import overview_figure as overview_figure
from pix2mass.report.run_files import OutOfFold as OutOfFold
from pix2mass.report.run_page import write_report as write_report
from pix2mass.report.store_page import Tile as Tile
from pix2mass.report.store_page import write_contact_sheet as write_contact_sheet
