"""stub"""
def check_before_submit(config, cluster): pass
