"""Print versions, and how to mend what is wrong with the installation."""
import os
import runpy

# By path: `import mmsinger` needs torch, whose absence is one of the faults
# to be told.
tools = os.path.dirname(os.path.realpath(__file__))
package = os.path.join(os.path.dirname(tools), 'mmsinger')  # the checkout's
if not os.path.isdir(package):
    package = os.path.dirname(os.path.dirname(tools))  # mmsinger/.mim/tools
runpy.run_path(os.path.join(package, 'environment.py'), run_name='__main__')
