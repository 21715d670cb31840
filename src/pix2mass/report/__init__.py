"""Every figure and every page of the project. Matplotlib and the templates live here and nowhere else."""

from pix2mass.report.catalog_page import write_catalog_report as write_catalog_report
from pix2mass.report.run_page import METHODS as METHODS
from pix2mass.report.run_page import ClusterMap as ClusterMap
from pix2mass.report.run_page import confusion_figure as confusion_figure
from pix2mass.report.run_page import overview_figure as overview_figure
from pix2mass.report.run_page import write_report as write_report
from pix2mass.report.store_page import Tile as Tile
from pix2mass.report.store_page import write_contact_sheet as write_contact_sheet
